"""`python -m kvfold`, and what `accelerate launch -m kvfold` runs."""

from kvfold.cli import main

if __name__ == "__main__":
    main()
