"""How the embedded base model capo-tiny is made, from invented text to published weights."""
