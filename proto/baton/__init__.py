"""Root of Baton's public API stubs; the API itself is `baton.inference.v1`."""
