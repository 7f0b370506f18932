"""Stages of the program: image encoders, decoding, filter, post-processing, NMS, matching, box."""


def cases(options):
    return iter(())
