"""`python -m lgc.analysis`."""

from lgc.analysis.command import analyze

if __name__ == "__main__":
    analyze()
