"""`python -m lirank`."""

from lirank.cli import main

if __name__ == "__main__":
    main()
