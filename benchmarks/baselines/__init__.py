"""What the federation is compared with: runs in .venv-bench, which has its own lock file."""
