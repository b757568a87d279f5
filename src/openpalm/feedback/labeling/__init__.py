"""The pages of labelers: items to judge, history, live chat."""
