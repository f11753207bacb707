"""The door for users of PEFT: importing this module registers our adapters with it.

```python
from peft import PeftModel
import reftune.peft  # from here on PEFT knows adapters of type REFTUNE

model = PeftModel.from_pretrained(base, "path/or/hub-name")
```
"""

from __future__ import annotations

from reftune.model.face import ReftConfig, ReftLayer, ReftModel, get_peft_model

__all__ = ["ReftConfig", "ReftLayer", "ReftModel", "get_peft_model"]
