"""What figures are still right, per precision: limits as data, and the judgement that applies them.

A report's metrics can be judged again with other limits: nothing here is computed from logits.
"""

from __future__ import annotations
