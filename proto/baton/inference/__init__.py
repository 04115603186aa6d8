"""The inference API; one subpackage per version."""
