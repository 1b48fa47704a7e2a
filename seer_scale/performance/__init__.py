"""What a run says of its own speed: utilisation, time by kind, stragglers."""
