"""The command line. Each file is one command; main.py gathers them."""
