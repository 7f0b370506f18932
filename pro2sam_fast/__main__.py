"""`python -m pro2sam_fast` prints which back ends loaded, which didn't and why."""

from .backends import report

if __name__ == "__main__":
    print(report())
