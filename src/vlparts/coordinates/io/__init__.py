"""Files of regions: JSON Lines, training records and COCO."""
