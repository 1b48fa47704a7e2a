"""Bytes on disk: safetensors files, writes past the page cache, full disks, owners of files."""
