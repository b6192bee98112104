"""The layers, and how they get into a model: prepare, train, convert."""
