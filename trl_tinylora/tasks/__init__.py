"""Tasks: the one place for a data set's prompt, gold answer, grading and reward, shared by RL, SFT and evaluation."""
