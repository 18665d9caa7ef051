"""A file of finished tasks as a product: what is written beside the masks, and the model that is made of it again."""
