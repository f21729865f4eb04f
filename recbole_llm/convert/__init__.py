"""Your data as a dataset: files of interactions and releases, converted to RecBole's atomic files, and what a dataset allows."""
