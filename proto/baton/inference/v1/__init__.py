"""Version 1 of the public API: messages in `*_pb2`, stubs and servicers in `*_pb2_grpc`. Generated."""
