"""Data sets of image files: folders, lists, ImageNet-LT, Places-LT and iNaturalist."""
