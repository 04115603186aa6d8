"""The front-end process: gRPC on one side, the core's frames on the other; text and status codes in between.

Never imports torch or transformers. Knows no groups, blocks or plans.
"""
