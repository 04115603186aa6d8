"""The private binary contract between core, workers and front-ends: layout, version, encode, decode, link.

Everything here is sans-IO except `transport`. Layouts are documented byte by byte in docs/wire.md.
Nothing in this package knows what a scheduler, a model or a gRPC call is.
"""
