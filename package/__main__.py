"""Run the command line as ``python -m dynexport``."""

from dynexport.exporter.cli.main import main

if __name__ == "__main__":
    main()
