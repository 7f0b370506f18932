"""Training steps of GTFormer-S and SAT-S."""


def cases(options):
    return iter(())
