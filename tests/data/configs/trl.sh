accelerate launch --num_processes 4 --config_file zero2.yaml \
    trl/scripts/sft.py --config trl.yaml --learning_rate 1e-4 --use_peft \
    --lora_r 32 --lora_target_modules q_proj v_proj --load_in_4bit
