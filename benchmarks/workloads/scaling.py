"""How cost grows with points, images, resolution and threads."""


def cases(options):
    return iter(())
