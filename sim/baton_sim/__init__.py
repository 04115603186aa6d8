"""The simulator: the production core, wire and link under a virtual clock and a hostile network."""
