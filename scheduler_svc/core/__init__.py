"""The pure core: sequences, blocks, prefix index, scheduler, placement, engine.

Integers and bytes in, integers and bytes out. Nothing here reads a clock, draws a random number, opens a
socket or imports gRPC, zmq or torch: time is handed in, so that the simulator drives the very same code.
"""
