"""The commands of `seer-scale`, a file each with `parser()` and `main(argv)`."""
