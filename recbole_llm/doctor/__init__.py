"""What is wrong with an installation. Nothing but the standard library is imported at the top of these files."""
