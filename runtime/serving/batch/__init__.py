"""Run a file of requests, in the form of OpenAI's batches, so that a run that was killed can be resumed."""
