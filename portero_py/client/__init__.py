"""What a backend imports to register itself."""
