"""`adamba train`, from a clone and under launchers: deepspeed --num_gpus 2 pretrain_adamba.py --preset tiny-hybrid"""

from megatron_adamba.commands.main import door

if __name__ == "__main__":
    door("train")
