"""OpenAI's HTTP interface: to the native engine by an app of ours, to other models by that of `transformers serve`."""
