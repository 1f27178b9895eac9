"""What only a GPU can show. Without one, nothing here is collected: a skipped test would look like one that ran."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
