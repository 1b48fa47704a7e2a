"""The commands of `seer-scale`: one file each, with `parser()` and `main(argv)`."""
