"""Files of regions: JSON Lines, training records, COCO, Label Studio and VIA."""
