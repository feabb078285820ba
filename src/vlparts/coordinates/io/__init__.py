"""Files of regions: JSON Lines, training records, COCO."""
