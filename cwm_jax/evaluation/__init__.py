"""How good the world is: rollouts, control, drift, against floors and under a written protocol.

single_step   how well the network denoises one frame (what training logs under `val/`, `epoch/`)
held_out      the real clips that rollouts are held against
drawing       how clips are drawn: a sampler, or anything else that turns actions into frames
scores        PSNR, SSIM and motion-aware PSNR of every drawn frame, on the device
intervals     means with bootstrap intervals over clips
quality       scores by horizon, and the floors beside them
control       what the actions are worth: ΔPSNR
sight, probe  a network that reads actions back from frames, and what it looks at
reading       how well it does so on drawn frames, beside real ones and chance
drift         whether long rollouts stay a game
protocol      under which conditions all this was measured
comparison    several measurements in one table, if their conditions are alike
charts, page  pictures, and the one page that holds them
closed_loop   the real simulator and the model side by side under the same keys
quick, full   the form that training calls, and the whole
"""
