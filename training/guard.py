"""Steps with non-finite loss or gradients: counted on the device, read only when a log line is written."""

import torch


class BadSteps:
    """Counters of bad steps, int64 on the device: of the whole run, currently in a row, most in a row."""

    def __init__(self, device):
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.seen = 0  # total when last read

    def count(self, bad):
        """Note one step; bad: 0-d bool on the device."""
        total, in_a_row, longest = self.counts
        in_a_row = (in_a_row + 1) * bad
        self.counts = torch.stack([total + bad, in_a_row, torch.maximum(longest, in_a_row)])

    def read(self):
        """Counts (of the whole run, since the last read, most in a row); waits for the device."""
        total, _, longest = self.counts.tolist()
        new, self.seen = total - self.seen, total
        return total, new, longest

    def state_dict(self):
        total, in_a_row, _ = self.counts.tolist()
        return {"bad_steps": total, "bad_steps_in_a_row": in_a_row}

    def load_state_dict(self, state):
        self.seen, in_a_row = state["bad_steps"], state["bad_steps_in_a_row"]
        self.counts.copy_(torch.tensor([self.seen, in_a_row, in_a_row]))
