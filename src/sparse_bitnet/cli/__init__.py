"""The commands; a short file each, which imports what it needs when it runs, so that `--help` is quick."""
