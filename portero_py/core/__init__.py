"""Pure decisions: who serves what, until when, and who may say so. Time is always an argument."""
