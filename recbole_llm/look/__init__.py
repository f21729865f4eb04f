"""A page that shows, for each user, what the models of finished runs recommend and the rank of the target."""
