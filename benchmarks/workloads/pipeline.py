"""The whole program, from JPEG files to boxes or galleries."""


def cases(options):
    return iter(())
