"""A reverse dictionary: from a definition to its word, over all of WordNet 3.1, with a pretrained encoder."""
