"""`python -m pipelines VERB`: the form in which a Ray job names a verb."""

from pipelines.cli import main

if __name__ == "__main__":
    main()
