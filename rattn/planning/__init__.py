"""What stands behind `python -m rattn.plan`: chips, roofline, and what the TPU compiler says."""
