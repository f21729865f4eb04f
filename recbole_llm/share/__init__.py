"""A finished run as a folder that others can load: weights, settings, record, passport and model card, without rows of data."""
