"""What people type, by group; cli.py puts them together."""
