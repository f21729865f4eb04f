"""What a dataset contains, and what each family of models would need of it."""
