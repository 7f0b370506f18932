"""Peak memory of ops and of the whole program, each in a fresh process."""


def cases(options):
    return iter(())
