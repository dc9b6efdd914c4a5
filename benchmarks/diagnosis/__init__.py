"""How well `clipx.diagnose` finds faults that were planted into real training runs."""
