"""What a trained model recommends to somebody: a user of the dataset, or a history that the model has never met."""
